// Package bus is everything Landfall does with NATS JetStream: facts, work and
// state. Nothing else imports a NATS package.
//
//   - Events ([Bus.PublishEvent], [Bus.Subscribe]) are facts, kept seven days.
//   - Work queues ([Bus.PublishTask], [Bus.Consumer]) hand tasks to workers:
//     acknowledged after the durable effect, delivered again when a worker dies,
//     parked with the reason after the last delivery.
//   - State ([OpenKV]) is versioned protobuf, written by compare-and-set only.
//   - [Bus.Lease] elects a singleton with a fencing generation.
//
// The server is embedded ([StartEmbedded]) in one process, or external; the code
// above does not know which. Everything is at least once: consumers are
// idempotent by task id, event id or revision, because deduplication works
// inside a window only and a lost acknowledgement always means a redelivery.
//
// # Durability
//
// State must survive power loss, so every write has to reach the disk before it
// is acknowledged. The embedded server does that. An external one needs
//
//	jetstream { sync_interval: always }
//
// in its configuration; its default synchronises every two minutes. A client
// cannot see that setting over the NATS protocol: give the address of the
// monitoring endpoint to [CheckDurability] and report what it says.
//
// # Names
//
// Formats of subjects, headers and stored values: docs/events.md and
// docs/formats/kv.md. Tokens of subjects are [a-z0-9-]; a site is one token.
package bus
