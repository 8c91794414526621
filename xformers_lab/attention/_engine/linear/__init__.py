"""The linear family: feature maps, and chunked recurrences without decay (`recurrence`) or with it (`gated`)."""
