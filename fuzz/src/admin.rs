//! The admin socket.

use std::time::Duration;

use lb_userspace::admin::{
    report::{Request, Response},
    server::{Query, REQUEST_BYTES, converse},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, duplex},
    runtime::Builder,
    sync::mpsc,
    time::timeout,
};

/// Longer than any conversation of some kilobytes takes.
const SOON: Duration = Duration::from_secs(10);

/// What a client says: each line is answered by one, with an error unless it is a request, and the conversation ends.
pub fn admin_socket(bytes: &[u8]) {
    let runtime = Builder::new_current_thread().enable_time().build().expect("there are descriptors left");
    let conversation = async { timeout(SOON, conversation(bytes)).await };
    let answers = runtime.block_on(conversation).expect("the conversation ends");
    let mut lines: Vec<_> = bytes.split_inclusive(|byte| *byte == b'\n').collect();
    // No line, but half of an end of one.
    lines.pop_if(|line| *line == b"\r");
    let answers: Vec<_> = answers.lines().collect();
    assert!(answers.len() <= lines.len(), "{answers:?}");
    for (line, answer) in lines.iter().zip(&answers) {
        let answer: Response = serde_json::from_str(answer).expect("an answer is one");
        let is_request = serde_json::from_slice::<Request>(line).is_ok();
        assert_eq!(is_request, answer == served(), "{line:?}: {answer:?}");
        assert!(is_request || matches!(answer, Response::Error(_)), "{answer:?}");
    }
    // A line that is no text, or too long, is the last that is answered.
    let text = |line: &[u8]| line.strip_suffix(b"\n").unwrap_or(line).to_vec();
    let is_last = |line: &[u8]| std::str::from_utf8(line).is_err() || text(line).len() > REQUEST_BYTES;
    let expected = lines.iter().position(|line| is_last(line)).map_or(lines.len(), |last| last + 1);
    assert_eq!(answers.len(), expected, "{answers:?}");
}

/// What the agent answers to every request here.
fn served() -> Response {
    Response::Services(Vec::new())
}

/// All that is answered to a client that says this, and no more.
async fn conversation(bytes: &[u8]) -> String {
    let (mut client, server) = duplex(1 << 16);
    let (sender, mut queries) = mpsc::channel::<Query>(1);
    let agent = async {
        while let Some(query) = queries.recv().await {
            // Whoever asked waits for it.
            let _gone = query.reply.send(served());
        }
    };
    let asking = async {
        let (mut answers, mut questions) = tokio::io::split(&mut client);
        let say = async {
            // It may have heard enough.
            let _closed = questions.write_all(bytes).await;
            let _closed = questions.shutdown().await;
        };
        let mut text = String::new();
        let (answered, ()) = tokio::join!(answers.read_to_string(&mut text), say);
        answered.expect("answers are text");
        text
    };
    let ((), (), text) = tokio::join!(converse(server, sender), agent, asking);
    text
}
