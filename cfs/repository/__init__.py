"""The repository: objects, streams, images and their names; spec repository 1 to 4, 8, 9."""
