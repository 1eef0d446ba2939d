"""Raw source -> Example -> array_record shards -> batches. Nothing here touches a device, flax or torch."""
