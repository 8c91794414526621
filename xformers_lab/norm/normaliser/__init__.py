"""The shelf of normalisers: (B, T, D) -> (B, T, D), statistics in float32."""
