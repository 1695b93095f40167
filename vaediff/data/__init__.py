"""Where pixels come from: the only folder that knows about files and data sets.

Reading order: `pixels` (scaling and flips, on the device), `resize` (crop and resize, on the host),
`readers` with `idx`, `npz`, `folder`, `tfds_reader` and `synthetic` (images as stored), `builders`
(TFDS data sets of our own), `cache` (resized images, stored once), `sources` (what the rest of the
package opens), `loader` (batches).

Must not import flax, models, diffusion, experiments or train. TensorFlow is never imported.
"""
