"""The arithmetic: one contract (`contract`), implementations (`reference`, `cpu`), and their choice (`factory`)."""
