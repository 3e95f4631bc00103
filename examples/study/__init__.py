"""What the scripts share: runs kept on disk, training, measuring, pictures."""
