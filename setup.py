"""Packages mask2former (the model) and d2_trt (its TensorRT plugin)."""

from setuptools import find_packages, setup

setup(
    name="d2_trt",
    version="0.1.0",
    description="Mask2Former on detectron2, with a TensorRT backend",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["mask2former", "mask2former.*", "d2_trt", "d2_trt.*"]),
    package_data={"mask2former.data.datasets": ["categories/*.json"]},
    # torch has no version here, so that installing this never replaces a GPU machine's own build.
    # detectron2 is needed too, but PyPI does not have it: see README.md.
    install_requires=[
        "torch",
        "numpy",
        "Pillow",
        "fvcore",
        "iopath",
        "pycocotools",
        "scipy",
        "tabulate",
    ],
    extras_require={
        "demo": ["opencv-python-headless", "tqdm"],
        "test": ["pytest", "pytest-xdist", "ruff", "transformers"],
    },
)
