"""How the page of `--mode=explore` looks: colours, sizes, and the kinds of controls that have a place on it.

Fonts are those of the machine, or of the library; nothing is fetched from elsewhere.
"""

from vaediff.modes import explore_controls as controls

ACCENT = '#0f766e'
KINDS = (
  controls.SEED, controls.CODE, controls.CLASS, controls.NUMBER, controls.CAPTION, controls.SEEN,
  controls.PICTURE,
)  # fmt: skip
CSS = """
body { background: #15181d; font-family: system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif; }
.nicegui-content { padding: 0; gap: 0; display: block; }
.top { display: flex; align-items: center; gap: 14px; height: 52px; padding: 0 18px; background: #0d0f13;
  color: #e8eaed; position: sticky; top: 0; z-index: 5; border-bottom: 1px solid #262b33; }
.brand { font-weight: 700; letter-spacing: .02em; color: #5eead4; }
.run { color: #9aa4b2; }
.top .q-space { flex: 1; }
.top .stage { min-width: 190px; }
.both { display: grid; grid-template-columns: 392px 1fr; min-height: calc(100vh - 53px); }
.panel { background: #f4f5f7; height: calc(100vh - 53px); overflow-y: auto; position: sticky; top: 53px;
  padding: 10px 12px 30px; box-sizing: border-box; }
.section { background: #fff; border: 1px solid #e2e5ea; border-radius: 9px; margin-bottom: 9px;
  overflow: hidden; width: 100%; }
.section .q-item { min-height: 34px; padding: 2px 12px; font-size: 12.5px; font-weight: 650; color: #334155; }
.section .nicegui-expansion-content { padding: 0; gap: 0; display: block; }
.inside { display: flex; flex-direction: column; gap: 8px; padding: 4px 12px 12px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; }
.wide { width: 100%; }
.q-btn-toggle { border: 1px solid #d5dae1; }
.q-btn-toggle .q-btn { font-size: 12px; }
.slide { display: grid; grid-template-columns: 106px 1fr 40px; align-items: center; gap: 10px; }
.slide.seed { grid-template-columns: 70px 1fr 40px 26px; }
.slide .name { font-size: 12px; color: #475569; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.slide .value { font-size: 12px; color: #0f172a; text-align: right; font-variant-numeric: tabular-nums; }
.note { font-size: 12px; color: #64748b; line-height: 1.45; overflow-wrap: anywhere; }
.upload { width: 100%; max-height: 96px; box-shadow: none; }
.upload .q-uploader__header { background: #eef2f6; color: #475569; }
.upload .q-uploader__title { font-size: 12.5px; font-weight: 500; }
.upload .q-uploader__list { display: none; }
.upload .q-uploader__subtitle { display: none; }
.canvas { display: flex; flex-direction: column; align-items: center; justify-content: center; gap: 14px;
  padding: 28px; color: #cbd5e1; min-width: 0; }
.pictures { display: flex; gap: 26px; justify-content: center; min-height: 200px; width: 100%; }
.pictures.rows { flex-direction: column; gap: 12px; align-items: center; }
.pictures figure { margin: 0; display: flex; flex-direction: column; align-items: center; gap: 9px;
  flex: 0 1 384px; min-width: 120px; }
.pictures img { display: block; width: 100%; image-rendering: pixelated; border-radius: 6px;
  background: #000; outline: 1px solid #2c323b; transition: outline-color .2s; }
.pictures.rows figure { flex: none; width: 100%; }
.pictures.rows img { width: min(980px, 100%); }
.pictures.quick img { outline: 2px dashed #b45309; }
.pictures img.stale { opacity: .3; outline: 1px solid #2c323b; }
.title { font-size: 13px; color: #94a3b8; }
.line { display: flex; align-items: center; gap: 10px; min-height: 24px; }
.status { font-size: 13px; color: #94a3b8; font-variant-numeric: tabular-nums; }
.message { min-height: 22px; color: #fca5a5; font-size: 13.5px; max-width: 760px; text-align: center;
  line-height: 1.5; overflow-wrap: anywhere; }
@media (max-width: 900px) {
  .both { grid-template-columns: 1fr; }
  .panel { height: auto; position: static; order: 2; }
  .pictures { flex-wrap: wrap; }
}
"""
"""Of the whole page: controls on light cards, pictures on a dark ground, where small differences are seen."""
