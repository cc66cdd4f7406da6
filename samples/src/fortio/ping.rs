//! The two gRPC messages that are sent, framed by hand: Fortio's `fgrpc.PingServer/Ping` and `grpc.health.v1.Health/Check`.

use bytes::{BufMut as _, Bytes, BytesMut};

/// Path of Fortio's own call.
pub(super) const PING: &str = "/fgrpc.PingServer/Ping";
/// Path of the standard health check.
pub(super) const HEALTH: &str = "/grpc.health.v1.Health/Check";

/// A message behind gRPC's prefix: not compressed, and its length.
pub(super) fn framed(message: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(5 + message.len());
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    frame.put_slice(message);
    frame.freeze()
}

/// `PingMessage { seq = 1, payload = 3 }`.
pub(super) fn message(sequence: u64, payload: &str) -> Bytes {
    let mut message = BytesMut::new();
    message.put_u8(1 << 3);
    varint(&mut message, sequence);
    if !payload.is_empty() {
        message.put_u8(3 << 3 | 2);
        varint(&mut message, payload.len() as u64);
        message.put_slice(payload.as_bytes());
    }
    framed(&message)
}

/// `HealthCheckResponse { status = SERVING }`.
pub(super) fn serving() -> Bytes {
    framed(&[1 << 3, 1])
}

fn varint(into: &mut BytesMut, mut value: u64) {
    while value >= 0x80 {
        into.put_u8((value as u8) | 0x80);
        value >>= 7;
    }
    into.put_u8(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_as_protobuf_writes_them() {
        assert_eq!(
            &message(300, "ab")[..],
            [0, 0, 0, 0, 7, 8, 0xac, 2, 0x1a, 2, b'a', b'b']
        );
        assert_eq!(&serving()[..], [0, 0, 0, 0, 2, 8, 1]);
    }
}
