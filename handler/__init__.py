"""What ships in the archive: everything between TorchServe's rows and its answers. It imports neither side."""
