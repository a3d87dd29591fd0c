"""knowsam: semi-supervised medical image segmentation with the Segment Anything Model."""

__version__ = "0.1.0"
