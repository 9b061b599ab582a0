"""The device mesh, and who holds what: batches split over devices, state on each."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dtm_jax.axes import BATCH_AXES, MESH_AXES
from dtm_jax.config import MeshConfig
from dtm_jax.errors import InputError


def create_mesh(config: MeshConfig) -> Mesh:
  """All devices as a mesh of `axes.MESH_AXES`; a size of -1 takes what is left.

  Raises:
    InputError: the sizes do not multiply to the number of devices.
  """
  sizes = [config.data, config.fsdp, config.tensor]
  num_devices = jax.device_count()
  known = int(np.prod([size for size in sizes if size != -1]))
  sizes = [num_devices // known if size == -1 else size for size in sizes]
  if int(np.prod(sizes)) != num_devices:
    raise InputError(f"config.mesh data x fsdp x tensor = {sizes} does not fit {num_devices} devices; -1 infers a size")
  return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis split over the batch axes."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def num_shards(mesh: Mesh) -> int:
  """Into how many shares batches are split."""
  return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def split_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
  """[n, ...] split over the batch axes, filled up with zeros to a multiple of the shares."""
  padding = [(0, -len(rows) % num_shards(mesh))] + [(0, 0)] * (rows.ndim - 1)
  return jax.device_put(np.pad(rows, padding), batch_sharding(mesh))


def check_batch_size(batch_size: int, mesh: Mesh, name: str) -> None:
  """Raises InputError where the devices cannot share the batch equally."""
  shards = num_shards(mesh)
  if batch_size % shards:
    raise InputError(
      f"{name}={batch_size} is not divisible by {shards} devices;"
      f" {max(shards, batch_size // shards * shards)} or {(batch_size // shards + 1) * shards} would be"
    )


def to_global(batch: Any, sharding: NamedSharding) -> Any:
  """Numpy arrays of this process's rows -> global arrays."""
  return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
