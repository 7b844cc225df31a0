"""Metadata and dependencies. Ranges are here; the exact versions that CI passes on are in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="gpt2-engine",
    version="0.1.0",
    description="A GPT-2 pretraining engine: from text to a model that speaks",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["kernels", "model", "engine", "engine.*"]),
    package_data={
        "engine.tokens": ["assets/*"],
        "engine.comparison": ["assets/*"],
        **{name: ["py.typed"] for name in ("kernels", "model", "engine")},
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
        "tiktoken>=0.7",
        "tyro>=0.9",
        "rich>=13",
        "safetensors>=0.4",
        "matplotlib>=3.8",
    ],
    extras_require={
        "data": ["pyarrow>=15", "huggingface_hub>=0.24", "zstandard>=0.22"],
        "fast": ["gigatoken>=0.10"],  # prepare, many times as fast as with tiktoken
        "tensorboard": ["tensorboard>=2.16"],
        "wandb": ["wandb>=0.31"],
        "dev": [
            "pytest>=8",
            "pytest-benchmark>=4",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "setuptools>=70.1",  # builds a wheel in a test
            "transformers>=4.44",
            "pyarrow>=15",
            "zstandard>=0.22",
            "gigatoken>=0.10",
            "tensorboard>=2.16",
        ],
    },
    entry_points={"console_scripts": ["gpt2=engine.cli:main"]},
)
