"""Sets of images that are no folders of files: archives, arrays, tables, and images in memory."""
