"""Pictures in: the project's own drawings, image folders, zip archives, Datasets; and caches of their latents."""
