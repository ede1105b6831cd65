"""Complete jobs: data and configuration in, a reconstruction out."""
