"""The workshop's machinery: scratch files, checks, and the measurement of how long every exercise takes. See WORKSHOP.md."""
