"""Where shards are worked on: `local` here; Spark comes later. An engine never changes what is written."""
