"""Packaging of Braid: the top-level folders are the sub-packages of the namespace package `braid`.

The wheel is pure Python and compiles its kernels when they are first used. With BRAID_BUILD_KERNELS=1 it holds them
compiled: `BRAID_BUILD_KERNELS=1 pip install --no-build-isolation .`, against the torch that is installed.
"""

import os
import sys
import tempfile
from importlib import util
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
FOLDERS = ("pretrain", "parallel", "data_pipeline", "kernels", "launch")


def packages() -> list[str]:
    """Every package below the five code folders, as `braid.<folder>[.<sub-package>]`."""
    names = []
    for folder in FOLDERS:
        names.append(f"braid.{folder}")
        names += [f"braid.{folder}.{name}" for name in find_packages(str(HERE / folder))]
    return names


EXTRAS = {
    "parquet": ["pyarrow>=15"],
    "hf": ["transformers>=4.45"],
    "wandb": ["wandb>=0.17"],
    "eval": ["sacrebleu>=2.4", "rouge-score>=0.1.2"],
    # parallel/megatron_cpu.py knows the sources of 0.16 only. There are wheels for Linux and Python 3.10 to 3.13;
    # elsewhere pip builds it from source, for which it needs no compiler.
    "megatron": ["megatron-core>=0.16.1,<0.17"],
    # Comes as source. It must leave the accumulation of gradients to Megatron-core's schedules and add them up over
    # ranks (`managed_gradient_accumulation`, `gradient_allreduce_op`); older versions overlook what they do not know.
    "deepspeed": ["deepspeed>=0.19.8"],
    "webdataset": ["webdataset>=1.0.2"],
    "s3": ["s3fs>=2024.2"],
    "gcs": ["gcsfs>=2024.2"],
    "http": ["aiohttp>=3.9"],
    # What mosaicml-streaming needs at run time. The package itself is installed with --no-deps (see the Makefile): what
    # it declares would replace torch and bring torchvision.
    "mds": [
        "zstd>=1.5",
        "Brotli>=1.1",
        "python-snappy>=0.7",
        "catalogue>=2.0",
        "pillow>=10",
        "tqdm>=4.60",
        "filelock>=3.12",
    ],
}
# moto is the S3 server of the tests (Flask is what it serves with), gcp-storage-emulator that of Google's protocol.
TEST_TOOLS = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.6",
    "setuptools>=77",
    "moto>=5",
    "flask>=3",
    "flask-cors>=5",
    "gcp-storage-emulator>=2024.8",
]
# Torch's CUDA build brings the version it wants; beside its CPU build tests interpret and compile the kernels with it.
EXTRAS["kernels"] = ['triton>=3.4; platform_system == "Linux"']
EXTRAS["test"] = [*TEST_TOOLS, *(package for extra in EXTRAS.values() for package in extra)]


def compile_kernels(folder: Path) -> None:
    """Put the compiled library into `folder`."""
    spec = util.spec_from_file_location("toolchain", HERE / "kernels" / "toolchain.py")
    toolchain = sys.modules["toolchain"] = util.module_from_spec(spec)
    spec.loader.exec_module(toolchain)
    tools = toolchain.find()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as objects:
        toolchain.build(tools, folder / toolchain.packaged_name(bool(tools.nvcc)), Path(objects))


def commands() -> dict[str, type]:
    """For a wheel with compiled kernels: of this platform, and of every Python."""
    if os.environ.get("BRAID_BUILD_KERNELS") != "1":
        return {}
    from setuptools.command.bdist_wheel import bdist_wheel

    class BuildWithKernels(build_py):
        def run(self) -> None:
            super().run()
            compile_kernels(Path(self.build_lib, "braid", "kernels", "compiled"))

    class PlatformWheel(bdist_wheel):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.root_is_pure = False

        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    return {"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel}


setup(
    name="braid-lm",
    version="0.1.0",
    description="Pretraining of discrete, continuous and joint diffusion language models at scale",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=packages(),
    package_dir={f"braid.{folder}": folder for folder in FOLDERS},
    package_data={
        "braid.pretrain": ["recipes/*.yaml", "report/assets/*"],
        "braid.kernels": ["*.inc", "csrc/*"],
    },
    install_requires=[
        "torch>=2.11,<2.14",
        "numpy>=1.26",
        "scipy>=1.11",
        "pyyaml>=6.0",
        "rich>=13",
        "safetensors>=0.4",
        "tokenizers>=0.20",
        "fsspec>=2024.2",
        "xxhash>=3.4",
        "zstandard>=0.22",
        "jinja2>=3.1",
        "matplotlib>=3.8",
    ],
    extras_require=EXTRAS,
    cmdclass=commands(),
    entry_points={"console_scripts": ["braid = braid.launch.cli:main"]},
)
