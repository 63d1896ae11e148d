package bus

import (
	"context"
	"errors"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

var (
	// ErrNotFound: the key, bucket, stream or consumer does not exist.
	ErrNotFound = errors.New("not found")
	// ErrExists: the key to create exists.
	ErrExists = errors.New("already exists")
	// ErrRevision: the record is not at the revision that the write named, so
	// somebody else wrote it. Read it again and decide again.
	ErrRevision = errors.New("revision mismatch")
	// ErrUnknown: whether a write happened could not be found out within the
	// context. Read the record again before deciding anything.
	ErrUnknown = errors.New("outcome unknown")
	// ErrName: a site, kind, event type, key or other token is malformed.
	ErrName = errors.New("malformed name")
	// ErrVersion: a stored value has a format version that this program does not know.
	ErrVersion = errors.New("unknown format version")
	// ErrLeaseLost is the cancel cause of the context of a lease that is over.
	ErrLeaseLost = errors.New("lease lost")
	// ErrNotConnected: no server could be reached within the context.
	ErrNotConnected = errors.New("not connected to NATS")
	// ErrRefused: the server was reached and refused the credentials or the
	// certificate; trying again does not help.
	ErrRefused = errors.New("refused by NATS")
	// NoChange, returned by the function given to [KV.Mutate], ends it without a
	// write and without an error.
	NoChange = errors.New("no change") //nolint:revive,staticcheck // not a failure, so not named Err
)

type permanentError struct{ err error }

func (e *permanentError) Error() string { return e.err.Error() }
func (e *permanentError) Unwrap() error { return e.err }

// Permanent marks an error of a handler as one that another delivery would only
// repeat. The task is reported, or parked, at once. Permanent(nil) is nil.
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return &permanentError{err}
}

// IsPermanent tells whether err was marked by [Permanent].
func IsPermanent(err error) bool {
	var p *permanentError
	return errors.As(err, &p)
}

// unknownOutcome tells whether a request may have been carried out although it
// returned err.
func unknownOutcome(err error) bool {
	for _, e := range []error{
		context.DeadlineExceeded, context.Canceled, nats.ErrTimeout, nats.ErrNoResponders, nats.ErrDisconnected,
		nats.ErrConnectionClosed, nats.ErrConnectionReconnecting, nats.ErrReconnectBufExceeded, nats.ErrStaleConnection,
		jetstream.ErrNoStreamResponse,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	var api *jetstream.APIError
	return errors.As(err, &api) && api.Code >= 500
}
