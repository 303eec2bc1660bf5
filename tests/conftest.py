"""Every test sees eight CPU devices, strict rank promotion, and warnings as errors (pyproject.toml)."""

import importlib.util
import os
import pathlib
import zlib

# Most of a test is compilation: a quarter of that is saved where LLVM optimises nothing (docs/log.md). Runs do without.
_FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")
for _flag in _FLAGS:
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax  # noqa: E402
import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]

jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiled functions are kept from run to run and shared by the workers; only slow compilations are worth a file.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real inputs beside the checkout; tests that need it skip by name where it is missing."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"real inputs missing: {path}")
    return path


@pytest.fixture(scope="session")
def _buckets():
    if importlib.util.find_spec("gcsfs") is None:  # not imported: it reads the environment once
        pytest.skip("buckets need the extra gcs, which the extra test brings")
    from tests import fake_bucket

    with fake_bucket.served() as empty:
        yield empty


@pytest.fixture
def bucket(_buckets, request):
    """An empty bucket on a server of this machine, of a name of its own: clients keep what they have read of others."""
    return _buckets(f"bucket{zlib.crc32(request.node.nodeid.encode()):x}")
