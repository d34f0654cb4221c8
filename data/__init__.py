"""Pictures in: the project's own drawings, image folders, zip archives and Datasets."""
