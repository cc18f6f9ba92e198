"""The decoder, its families, and the way from weights on disk to packed layers."""
