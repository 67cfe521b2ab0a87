"""KV memory: blocks, tables, prefix cache, tiers. The only place that counts blocks."""
