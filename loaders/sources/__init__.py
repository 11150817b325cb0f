"""Where the images of a pack come from: what a source holds, how its images are checked, and its kinds."""
