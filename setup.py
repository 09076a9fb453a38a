"""Packaging. `configs/` is a top-level folder of the checkout and `streamtrain/configs/` in the wheel."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="streamtrain",
    version="0.1.0",
    description="Streaming, low-memory trainer for DINOv3-style self-supervised vision transformers",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[
        *find_packages(include=["shards", "shards.*", "streamtrain", "streamtrain.*"]),
        "streamtrain.configs",
    ],
    package_dir={"streamtrain.configs": "configs"},
    package_data={"streamtrain.configs": ["*.yaml"], "streamtrain.ops.cpu": ["*.h", "*.cpp"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19,<0.20",
        "webdataset>=1.0",
        "pyyaml>=6",
        "pydantic>=2.7",
        "tensorboard>=2.16",
        "numpy>=1.26",
        "pillow>=10",
        "tqdm>=4.66",
        "fsspec>=2024.2",
        "safetensors>=0.4.3",
        "filelock>=3.13",
    ],
    extras_require={
        "cu13": ["nvidia-dali-cuda130>=2.4,<3"],
        "cu12": ["nvidia-dali-cuda120>=2.4,<3"],
        "hf": ["transformers>=5"],
        "8bit": ["torchao>=0.12"],
        "http": ["aiohttp"],
        "s3": ["s3fs>=2024.6"],
        "gcs": ["gcsfs>=2024.6"],
        "parquet": ["pyarrow"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow-skinny"],
        "test": [
            "pytest>=8",
            "pytest-xdist",
            "hypothesis",
            "mlflow-skinny",
            "wandb",
            "aiohttp",
            "flask",
            "flask-cors",
            "moto[s3]>=5",
            "pyarrow",
            "s3fs>=2024.6",
            "scikit-learn",
            "torchao>=0.12",
            "transformers>=5",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-tqdm",
            "setuptools>=70.1",
        ],
    },
)
