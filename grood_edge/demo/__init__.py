"""The main job, end to end, on real images that come with scikit-learn and scikit-image."""
