"""What the scripts of the study share: runs kept on disk, training, measuring, pictures."""
