"""From published data sets to rows about what is in their images: `pvm filter`."""
