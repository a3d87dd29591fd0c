"""Images, masks, splits, the decoded cache, the two-stream batches and their augmentation."""
