"""Packaging. Lower bounds only: installing dbkit replaces nothing that a machine already has."""

from pathlib import Path

from setuptools import setup

setup(
    name="dbkit",
    version="0.1.0",
    description="Teach Stable Diffusion a subject or a style from a handful of pictures",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["dbkit", "dbkit.data_templates"],
    package_dir={"dbkit.data_templates": "data_templates"},
    package_data={"dbkit": ["py.typed", "assets/*/*", "assets/*/*/*"], "dbkit.data_templates": ["*", "*/*"]},
    install_requires=[
        "torch>=2.4",
        "diffusers>=0.30",
        "transformers>=4.44",
        "accelerate>=0.33",
        "safetensors>=0.4",
        "Pillow>=10.1",
        "ipywidgets>=7.7",
        "PyYAML>=6.0",
        "tqdm>=4.60",
        "ImageHash>=4.3",
    ],
    extras_require={
        # The tagger. BLIP needs nothing more than dbkit does.
        "caption": ["onnxruntime>=1.17"],
        # HEIC photographs; faces (by what OpenCV bundles before version 5); text and watermarks.
        "photos": ["pillow-heif>=0.16", "opencv-python-headless>=4.7", "rapidocr>=3.0", "onnxruntime>=1.17"],
        "lora": ["peft>=0.12"],
        # 8-bit AdamW, by the first of the two that works; Lion and Prodigy.
        "optimizers": ["bitsandbytes>=0.43", "torchao>=0.7", "pytorch_optimizer>=3.0"],
        "log": ["tensorboard>=2.10", "wandb>=0.15"],
        "test": [
            "bitsandbytes>=0.43",
            "ipykernel>=6",
            "nbclient>=0.7",
            "nbval>=0.10",
            "onnx>=1.16",
            "onnxruntime>=1.17",
            "opencv-python-headless>=4.7",
            "peft>=0.12",
            "pillow-heif>=0.16",
            "pytest>=8",
            "pytest-xdist>=3.7",
            "pytorch_optimizer>=3.0",
            "rapidocr>=3.0",
            "ruff>=0.6",
            "tensorboard>=2.10",
            "torchao>=0.7",
            "wandb>=0.15",
        ],
    },
    entry_points={"console_scripts": ["dbkit=dbkit.cli:main"]},
)
