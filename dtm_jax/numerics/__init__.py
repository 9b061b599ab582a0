"""XLA against PyTorch: the same training step written twice, and what comes out of both."""

from dtm_jax.errors import InputError


def require_torch() -> None:
  """To be called before a module that imports PyTorch, which is optional, is imported.

  Raises:
    InputError: it is not installed.
  """
  try:
    import torch  # noqa: F401
  except ModuleNotFoundError as error:
    raise InputError(
      "this needs PyTorch: pip install -e '.[test]' in a checkout of dtm_jax, or see https://pytorch.org"
    ) from error
