"""The compiled decoder of JPEG crops; everything else is declared in pyproject.toml."""

from setuptools import Extension, setup

# Optional: without a C compiler or libjpeg-turbo's headers, data/images/jpeg.py decodes with
# simplejpeg, to the same pixels.
setup(
    ext_modules=[
        Extension("data.images._crop", ["data/images/_crop.c"], libraries=["jpeg"], optional=True)
    ]
)
