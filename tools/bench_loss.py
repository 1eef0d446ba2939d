"""Memory of the contrastive loss: temporaries a device of value and gradient, ring of tiles against gathered columns.

    python tools/bench_loss.py --devices 8 --batch 32768 262144

From the compiler's own buffer assignment on so many fake CPU devices: nothing is run, so load does not matter.
"""

from __future__ import annotations

import argparse
import json
import os


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--devices", type=int, default=8)
    p.add_argument("--batch", type=int, nargs="+", default=[32768, 262144], help="global batch sizes")
    p.add_argument("--dim", type=int, default=512)
    p.add_argument("--tile", type=int, default=512, help="columns a tile of the ring")
    p.add_argument("--gathered-limit", type=int, default=65536, help="largest batch for the gathered form")
    return p.parse_args()


def main() -> None:
    args = parse()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
    import jax
    import jax.numpy as jnp

    from unimed_jax import config, parallel
    from unimed_jax.train.loss import contrastive_loss

    mesh = parallel.make_mesh(config.Mesh())
    rows, whole = parallel.batch_sharding(mesh), parallel.replicated(mesh)
    found = []
    for batch in args.batch:
        for impl in ("ring", "gathered"):
            if impl == "gathered" and batch > args.gathered_limit:
                continue

            def value(a, b, s, impl=impl):
                return contrastive_loss(a, b, s, mesh=mesh, impl=impl, tile=args.tile)[0]

            z = jax.ShapeDtypeStruct((batch, args.dim), jnp.float32, sharding=rows)
            s = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
            compiled = jax.jit(jax.value_and_grad(value, (0, 1, 2))).lower(z, z, s).compile()
            memory = compiled.memory_analysis()
            if memory is None:
                raise SystemExit("this backend gives no memory analysis")
            found.append(
                {
                    "loss": impl,
                    "global batch": batch,
                    "temporaries a device, GB": round(memory.temp_size_in_bytes / 1e9, 3),
                }
            )
    print(json.dumps({"devices": args.devices, "dim": args.dim, "tile": args.tile, "found": found}, indent=1))


if __name__ == "__main__":
    main()
