//! Tables for people: columns and nothing else, so that they can be cut and grepped as well.

use comfy_table::{Table, presets::NOTHING};

/// A table under a header; ends with a line break.
pub(super) fn table<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header).add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    table.trim_fmt() + "\n"
}
