"""Packaging of Braid: the top-level folders are the sub-packages of the namespace package `braid`."""

from pathlib import Path

from setuptools import find_packages, setup

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
TEST_TOOLS = ["pytest>=8", "hypothesis>=6.100", "ruff>=0.6", "setuptools>=77"]
EXTRAS["test"] = [*TEST_TOOLS, *(package for extra in EXTRAS.values() for package in extra)]
# Torch's CUDA build brings the version it wants; beside its CPU build tests interpret and compile the kernels with it.
EXTRAS["kernels"] = ['triton>=3.4; platform_system == "Linux"']

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
        "xxhash>=3.4",
        "zstandard>=0.22",
        "jinja2>=3.1",
        "matplotlib>=3.8",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["braid = braid.launch.cli:main"]},
)
