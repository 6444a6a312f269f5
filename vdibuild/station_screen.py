"""What a station shows: full screen on every monitor, told line by line on standard input.

A line is JSON: `title` and `text`; `pictures`, a folder whose pictures are shown behind them, in the order
of their names, or empty; `seconds`, how long each of them; `entry`, whether there is a line to type in:
`shown`, `hidden` as passwords are, or empty. It prints `shown` when its first screen is to be seen; `pressed`
for a key or a button; `technician` for Control, Alt and T together; and of a line to type in, `entered` and
what was typed, or `left` for Escape. At the end of its input it ends.

GTK is there already: virt-viewer needs it. This runs in the live system, not on the host.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gi

for _name, _version in (("Gtk", "3.0"), ("Gdk", "3.0"), ("GdkPixbuf", "2.0")):
    gi.require_version(_name, _version)
from gi.repository import Gdk, GdkPixbuf, Gio, GLib, Gtk  # noqa: E402 (after their versions are chosen)

_STYLE = b"""
window { background-color: #16222e; }
box { background-color: rgba(10, 18, 26, 0.78); padding: 32px 48px; }
.title { color: #ffffff; font: bold 40px "DejaVu Sans"; }
.text { color: #d4dde6; font: 24px "DejaVu Sans"; }
entry { font: 24px "DejaVu Sans"; }
"""
_ENDINGS = (".jpg", ".jpeg", ".png")
_WIDEST = 60  # characters in a line
_MODIFIERS = (
    *("Shift_L", "Shift_R", "Control_L", "Control_R", "Alt_L", "Alt_R", "Meta_L", "Meta_R"),
    *("Super_L", "Super_R", "ISO_Level3_Shift", "Caps_Lock", "Num_Lock", "Scroll_Lock"),
)
_BOTH = Gdk.ModifierType.CONTROL_MASK | Gdk.ModifierType.MOD1_MASK


class Monitor:
    """The window of one monitor."""

    def __init__(self, display: Any, number: int) -> None:
        area = display.get_monitor(number).get_geometry()
        self._width, self._height = area.width, area.height
        self.window = Gtk.Window()
        self.window.set_decorated(False)
        # What is typed belongs to the first one's line, wherever the window manager would have it.
        self.window.set_accept_focus(number == 0)
        self.window.set_default_size(area.width, area.height)
        self.window.move(area.x, area.y)
        self._picture = Gtk.Image()
        self._title, self._text = Gtk.Label(), Gtk.Label()
        for label, name in ((self._title, "title"), (self._text, "text")):
            label.get_style_context().add_class(name)
            label.set_line_wrap(True)
            label.set_max_width_chars(_WIDEST)
            label.set_justify(Gtk.Justification.CENTER)
        box = Gtk.Box(orientation=Gtk.Orientation.VERTICAL, spacing=24)
        box.set_valign(Gtk.Align.CENTER)
        box.add(self._title)
        box.add(self._text)
        self.entry = Gtk.Entry()
        self.entry.set_no_show_all(True)
        box.add(self.entry)
        layers = Gtk.Overlay()
        layers.add(self._picture)
        layers.add_overlay(box)
        self.window.add(layers)
        self.is_up = False
        self.window.connect("map-event", self._came_up)
        self.window.show_all()
        self.window.fullscreen_on_monitor(display.get_default_screen(), number)
        blank = Gdk.Cursor.new_for_display(display, Gdk.CursorType.BLANK_CURSOR)
        self.window.get_window().set_cursor(blank)

    def _came_up(self, _window: Any, _event: Any) -> bool:
        self.is_up = True
        self.window.queue_draw()
        return False

    def say(self, title: str, text: str) -> None:
        """Show a text."""
        self._title.set_text(title)
        self._text.set_text(text)

    def ask(self, entry: str) -> None:
        """Have a line to type in: `shown` or `hidden`; or none."""
        self.entry.set_text("")
        self.entry.set_visible(bool(entry))
        self.entry.set_visibility(entry == "shown")
        if entry:
            self.entry.grab_focus()

    def picture(self, path: Path | None) -> None:
        """Show a picture behind it, or none; one that cannot be read leaves the one before."""
        if path is None:
            self._picture.clear()
            return
        try:
            whole = GdkPixbuf.Pixbuf.new_from_file_at_scale(str(path), self._width, self._height, True)
        except GLib.Error as error:
            print(f"{path}: {error.message}", file=sys.stderr)
            return
        self._picture.set_from_pixbuf(whole)


class Screen:
    """All monitors, and what they show."""

    def __init__(self) -> None:
        display = Gdk.Display.get_default()
        if display is None:
            raise SystemExit("there is no display")
        style = Gtk.CssProvider()
        style.load_from_data(_STYLE)
        priority = Gtk.STYLE_PROVIDER_PRIORITY_APPLICATION
        Gtk.StyleContext.add_provider_for_screen(display.get_default_screen(), style, priority)
        self._display = display
        self._monitors = [Monitor(display, number) for number in range(display.get_n_monitors())]
        self._pictures: list[Path] = []
        self._next = 0
        self._timer = 0
        self._watching = False
        self._said = False
        self._asking = False
        self._monitors[0].entry.connect("activate", self._entered)
        for monitor in self._monitors:
            for event in ("key-press-event", "button-press-event"):
                monitor.window.connect(event, self._pressed)
        channel = Gio.UnixInputStream.new(sys.stdin.fileno(), False)
        self._lines = Gio.DataInputStream.new(channel)
        self._read()

    def _read(self) -> None:
        self._lines.read_line_async(GLib.PRIORITY_DEFAULT, None, self._told)

    def _told(self, lines: Any, result: Any) -> None:
        line, _ = lines.read_line_finish_utf8(result)
        if line is None:
            Gtk.main_quit()
            return
        self._show(json.loads(line))
        self._read()

    def _show(self, wanted: dict[str, Any]) -> None:
        for monitor in self._monitors:
            monitor.say(wanted["title"], wanted["text"])
        self._asking = bool(wanted["entry"])
        self._monitors[0].ask(wanted["entry"])
        if self._timer:
            GLib.source_remove(self._timer)
            self._timer = 0
        folder = Path(wanted["pictures"]) if wanted["pictures"] else None
        found = folder.iterdir() if folder and folder.is_dir() else ()
        self._pictures = sorted(path for path in found if path.suffix.lower() in _ENDINGS)
        self._next = 0
        if self._pictures:
            self._turn()
            self._timer = GLib.timeout_add_seconds(max(1, wanted["seconds"]), self._turn)
        else:
            for monitor in self._monitors:
                monitor.picture(None)
        if not self._watching:
            self._watching = True
            clock = self._monitors[0].window.get_frame_clock()
            clock.connect("after-paint", self._painted)
            clock.request_phase(Gdk.FrameClockPhase.PAINT)

    def _painted(self, _clock: Any) -> None:
        """Say that the first screen is to be seen: it is drawn, and its window has come up."""
        if not self._said and self._monitors[0].is_up:
            self._said = True
            self._display.sync()
            print("shown", flush=True)

    def _turn(self) -> bool:
        for monitor in self._monitors:
            monitor.picture(self._pictures[self._next])
        self._next = (self._next + 1) % len(self._pictures)
        return True

    def _pressed(self, _window: Any, event: Any) -> bool:
        is_key = event.type == Gdk.EventType.KEY_PRESS
        if self._asking:
            if is_key and event.keyval == Gdk.KEY_Escape:
                print("left", flush=True)
                return True
            return False
        if is_key and Gdk.keyval_name(event.keyval) in _MODIFIERS:
            return True
        if is_key and event.keyval in (Gdk.KEY_t, Gdk.KEY_T) and event.state & _BOTH == _BOTH:
            print("technician", flush=True)
        else:
            print("pressed", flush=True)
        return True

    def _entered(self, entry: Any) -> None:
        print(f"entered {entry.get_text()}", flush=True)
        entry.set_text("")


if __name__ == "__main__":
    Screen()
    Gtk.main()
