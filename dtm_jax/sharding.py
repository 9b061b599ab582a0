"""The device mesh, and who holds what: batches split over `data` and `fsdp`, state over `fsdp` and `tensor`."""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dtm_jax.axes import BATCH, BATCH_AXES, DATA, EMBED, FSDP, HEADS, MESH_AXES, MLP, OUT, TENSOR
from dtm_jax.config import MeshConfig
from dtm_jax.errors import InputError
from dtm_jax.models.layers import Constrain, unconstrained

# Of arrays [B, ...] by name; float32 results are means over B, and so the mean of those for equal shares of the rows.
OfRows = Callable[[dict[str, jax.Array]], Any]
Average = Callable[[OfRows], OfRows]  # the same function, for rows that devices share

# Logical axis -> the mesh axes that share it. A mesh axis that does not divide a size leaves it whole.
RULES = {BATCH: BATCH_AXES, EMBED: (FSDP,), HEADS: (TENSOR,), MLP: (TENSOR,), OUT: (TENSOR,)}

# How the name of a parameter ends -> the logical axis of each of its axes. Moments and averages of the optimiser end
# with the name of their parameter, and so lie where it does.
PARAMETER_AXES = (
  (r"[qkv]/kernel", (EMBED, HEADS)),
  (r"[qkv]/bias", (HEADS,)),
  (r"attn/proj/kernel", (HEADS, EMBED)),
  (r"attn/proj/bias", (EMBED,)),
  (r"rel_pos_bias", (None, HEADS)),
  (r"fc1/kernel", (EMBED, MLP)),
  (r"fc1/bias", (MLP,)),
  (r"fc2/kernel", (MLP, EMBED)),
  (r"fc2/bias", (EMBED,)),
  (r"gamma_[12]", (EMBED,)),
  (r"(norm1|norm2|norm|fc_norm|ln_pre|ln_post)/(scale|bias)", (EMBED,)),
  (r"patch_embed/kernel", (None, None, None, EMBED)),
  (r"patch_embed/bias", (EMBED,)),
  (r"(cls|mask)_token", (None, None, EMBED)),
  (r"class_embedding", (EMBED,)),
  (r"pos_embed", (None, EMBED)),
  (r"head/kernel", (EMBED, OUT)),
  (r"head/bias", (OUT,)),
  (r"proj", (EMBED, OUT)),  # CLIP's last
)


# ------------------------------------------------------------ the mesh


def create_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The devices, all for None, as a mesh of `axes.MESH_AXES`; a size of -1 takes what is left.

  Raises:
    InputError: the sizes do not multiply to the number of devices, or `tensor` would cross slices.
  """
  devices = jax.devices() if devices is None else devices
  grid = device_grid(devices, mesh_sizes(config, len(devices)))
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * grid.ndim)


def mesh_sizes(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
  """Devices along each of `axes.MESH_AXES`. Raises InputError where they do not multiply to `num_devices`."""
  asked = [config.data, config.fsdp, config.tensor]
  known = math.prod(size for size in asked if size != -1)
  sizes = [num_devices // known if size == -1 else size for size in asked]
  if math.prod(sizes) != num_devices:
    is_inferred = -1 in asked
    raise InputError(
      f"config.mesh data x fsdp x tensor = {asked} does not fit the number of devices, {num_devices}:"
      f" {known} {'does not divide' if is_inferred else 'is not'} it; change {'them' if is_inferred else 'one to -1'}"
    )
  return tuple(sizes)


def device_grid(devices: Sequence[jax.Device], sizes: tuple[int, int, int]) -> np.ndarray:
  """Devices in the order that their network likes best, objects [data, fsdp, tensor].

  Several slices (TPU pods that a slower network joins, and for JAX the nodes of a GPU cluster, too) share the outer
  axes, so that what talks most stays inside of one. Raises InputError where they do not fit.
  """
  num_slices = len({getattr(device, "slice_index", 0) for device in devices})
  options = {"devices": devices, "allow_split_physical_axes": True}
  if num_slices == 1:
    return _in_process_order(mesh_utils.create_device_mesh(sizes, **options))
  across = sizes_across_slices(sizes, num_slices)
  within = [size // slices for size, slices in zip(sizes, across, strict=True)]
  return _in_process_order(mesh_utils.create_hybrid_device_mesh(within, across, **options))


def sizes_across_slices(sizes: tuple[int, int, int], num_slices: int) -> tuple[int, int, int]:
  """How many slices each mesh axis spans: as many as it can along `data`, and the rest along `fsdp`.

  Raises:
    InputError: so many slices do not fit into these two.
  """
  data, fsdp, tensor = sizes
  along_data = math.gcd(data, num_slices)
  along_fsdp = num_slices // along_data
  if fsdp % along_fsdp:
    raise InputError(
      f"config.mesh data x fsdp x tensor = {list(sizes)} does not fit {num_slices} slices or nodes, of which data and"
      f" fsdp have to be multiples: set config.mesh.tensor to at most their devices, or data to {num_slices}"
    )
  return along_data, along_fsdp, 1


def describe(mesh: Mesh) -> str:
  """Such as "8 cpu devices, data 2 x fsdp 2 x tensor 2"."""
  platform = mesh.devices.flat[0].platform
  if mesh.size == 1:
    return f"1 {platform} device"
  return f"{mesh.size} {platform} devices, " + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


# ------------------------------------------------------------ parameters and what follows them


def shard(tree: Any, mesh: Mesh) -> Any:
  """The sharding of each leaf of parameters, or of a train state around them.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`s; the names of all but scalars end as `PARAMETER_AXES` has them.
    mesh: of `axes.MESH_AXES`.

  Returns:
    The same tree of `NamedSharding`s; scalars are on every device.

  Raises:
    ValueError: a name that `PARAMETER_AXES` does not have.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(mesh, parameter_spec(_name(path), leaf.shape, mesh.shape)), tree
  )


def parameter_spec(name: str, shape: Sequence[int], mesh_shape: Mapping[str, int]) -> PartitionSpec:
  """How one parameter is split, or a part of the optimiser's state that is named after it. Raises as `shard`.

  What the rules leave whole over `fsdp` or `tensor` is split along the longest of its axes that can be, so that no
  device holds more of the state than its share.
  """
  if not shape:
    return PartitionSpec()
  split = _split(_axes_of(name, shape), shape, mesh_shape)
  for unused in (axis for axis in (FSDP, TENSOR) if not any(axis in on for on in split)):
    fits = [i for i, on in enumerate(split) if shape[i] % _product((*on, unused), mesh_shape) == 0]
    if fits:
      longest = max(fits, key=lambda i: shape[i])
      split[longest] = (*split[longest], unused)
  return _to_spec(split)


def _axes_of(name: str, shape: Sequence[int]) -> tuple[str | None, ...]:
  for pattern, axes in PARAMETER_AXES:
    if re.fullmatch(f"(.*/)?{pattern}", name) and len(axes) == len(shape):
      return axes
  raise ValueError(f"sharding.PARAMETER_AXES has no rule for {name}, {list(shape)}")


def _split(axes: Sequence[str | None], shape: Sequence[int], mesh_shape: Mapping[str, int]) -> list[tuple[str, ...]]:
  """The mesh axes that share each axis, as the rules have it where the sizes allow."""
  wanted = [RULES[axis] if axis else () for axis in axes]
  return [on if size % _product(on, mesh_shape) == 0 else () for on, size in zip(wanted, shape, strict=True)]


def _product(axes: Sequence[str], mesh_shape: Mapping[str, int]) -> int:
  return math.prod(mesh_shape[axis] for axis in axes)


def _to_spec(split: Sequence[tuple[str, ...]]) -> PartitionSpec:
  return PartitionSpec(*(on[0] if len(on) == 1 else on or None for on in split))


def _name(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def put(params: Any, mesh: Mesh) -> Any:
  """Host arrays -> each device's part of them on the devices, split as `shard` says."""
  return jax.tree.map(place, params, shard(params, mesh))


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """An array that every process has -> on the devices; unlike `jax.device_put`, processes do not compare theirs."""
  return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


# ------------------------------------------------------------ activations and batches


def constrain_to(mesh: Mesh) -> Constrain:
  """What models on a mesh are given as `constrain`."""
  if mesh.size == 1:
    return unconstrained

  def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    if jax.sharding.get_abstract_mesh().manual_axes:  # a device's own part, see `mean_of_devices`
      return x
    spec = _to_spec(_split(axes, x.shape, mesh.shape))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

  return constrain


def average_on(mesh: Mesh) -> Average:
  """How steps on a mesh compute losses and gradients of rows that devices share; they are given it as `average`.

  All leave it to the compiler but CPUs of several processes. These exchange by Gloo, one array after the other, and
  each costs one or two milliseconds, however small it is.
  """
  has_gloo = jax.process_count() > 1 and mesh.devices.flat[0].platform == "cpu"
  if has_gloo and mesh.shape[DATA] == mesh.size:
    return functools.partial(mean_of_devices, mesh=mesh)
  return by_compiler


def by_compiler(of_rows: OfRows) -> OfRows:
  """An `Average` that leaves to the compiler what is summed over devices, and when."""
  return of_rows


def mean_of_devices(of_rows: OfRows, mesh: Mesh) -> OfRows:
  """An `Average` by which each device computes on its own rows, and the results are summed as one array.

  Args:
    of_rows: may use what each device has whole, but nothing of other rows.
    mesh: with devices along `data` alone, each of which has the whole state; they share the rows equally.
  """

  def of_own_rows(rows):
    flat, unravel = ravel_pytree(of_rows(rows))
    return unravel(jax.lax.pmean(flat, BATCH_AXES))

  # Unchecked: jax would else sum the gradients, each by itself, where they are taken.
  return jax.shard_map(
    of_own_rows, mesh=mesh, in_specs=PartitionSpec(BATCH_AXES), out_specs=PartitionSpec(), check_vma=False
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis split over the batch axes."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def num_shards(mesh: Mesh) -> int:
  """Into how many shares batches are split."""
  return _product(BATCH_AXES, mesh.shape)


def round_up(number: int, mesh: Mesh) -> int:
  """The next multiple of the shares."""
  return number + -number % num_shards(mesh)


def split_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
  """[n, ...] split over the batch axes, filled up with zeros to a multiple of the shares."""
  padding = [(0, round_up(len(rows), mesh) - len(rows))] + [(0, 0)] * (rows.ndim - 1)
  return place(np.pad(rows, padding), batch_sharding(mesh))


def check_batch_size(batch_size: int, mesh: Mesh, name: str) -> None:
  """Raises InputError where the devices cannot share the batch equally."""
  shards, tensor = num_shards(mesh), mesh.shape[TENSOR]
  if batch_size % shards:
    devices = "devices" if tensor == 1 else f"groups of {tensor} devices"
    above = round_up(batch_size, mesh)
    below = f"{above - shards} or " if above > shards else ""
    raise InputError(f"{name}={batch_size} is not divisible by {shards} {devices}; {below}{above} would be")


def to_global(batch: Any, sharding: NamedSharding) -> Any:
  """Numpy arrays of this process's rows -> global arrays."""
  return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


# ------------------------------------------------------------ processes


def batch_share(mesh: Mesh) -> tuple[int, int]:
  """Which share of a global batch's rows this process feeds: (index, number of shares).

  Processes that hold the same rows, because `tensor` crosses them, have the same share.

  Raises:
    InputError: see `row_shares`.
  """
  return row_shares(_owners(mesh.devices))[jax.process_index()]


def row_shares(owners: np.ndarray) -> dict[int, tuple[int, int]]:
  """The share of rows (index, number of shares) of each process.

  Args:
    owners: int [rows, tensor], the process of each device; a row of devices holds a share of the batch.

  Raises:
    InputError: the rows of a process are not one piece, or another has more.
  """
  rows = {process: np.flatnonzero((owners == process).any(axis=1)) for process in np.unique(owners).tolist()}
  size = max(map(len, rows.values()))
  if any(len(own) != size or own[-1] - own[0] != size - 1 or own[0] % size for own in rows.values()):
    raise InputError(
      "the processes do not hold equal shares of a batch; choose config.mesh.tensor so that it divides the devices of a"
      " process or is a multiple of them, and give each process as many devices"
    )
  return {process: (int(own[0]) // size, len(owners) // size) for process, own in rows.items()}


def _owners(devices: np.ndarray) -> np.ndarray:
  return np.vectorize(lambda device: device.process_index, otypes=[int])(devices.reshape(-1, devices.shape[-1]))


def _in_process_order(devices: np.ndarray) -> np.ndarray:
  """The same grid, but with the rows of each process side by side where the network's best order scatters them.

  A batch would else have its images in another order on another number of processes.
  """
  owners = _owners(devices)
  try:
    row_shares(owners)
    return devices
  except InputError:
    order = np.argsort(owners.min(axis=1), kind="stable")
    return devices.reshape(owners.shape)[order].reshape(devices.shape)
