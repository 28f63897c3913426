"""Where a job's processes live: one seam, and what stands behind it."""
