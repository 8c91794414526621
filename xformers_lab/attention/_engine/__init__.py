"""The two engines behind the shelf: block-sparse softmax over a pattern, and the chunked linear recurrence."""
