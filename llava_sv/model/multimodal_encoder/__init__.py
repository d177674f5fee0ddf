"""Vision encoders: pixels in, `VisionFeatures` out."""
