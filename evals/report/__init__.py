"""The page that `mnif report` writes: what it shows of a run, what it says of it, and its templates in ``page/``."""
