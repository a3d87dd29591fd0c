"""A user's folder of images and masks: read, understood, divided into lists, and made into an experiment."""
