"""Where shards are worked on: processes of this machine, or Spark. An engine never changes what is written."""
