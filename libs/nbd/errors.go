package nbd

import (
	"errors"
	"fmt"

	"github.com/landfall-dr/landfall/libs/nbd/internal/wire"
)

// Sentinel errors. All but ErrURI end the connection.
var (
	// ErrURI: the URI is not one of nbd://HOST:PORT/EXPORT and nbd+unix:///EXPORT?socket=PATH.
	ErrURI = errors.New("not the URI of an NBD export")
	// ErrNoContext: the server does not offer a meta context that was asked for.
	ErrNoContext = errors.New("export does not offer the context")
	// ErrNoExport: the server has no such export, or does not give it to us.
	ErrNoExport = errors.New("server refuses the export")
	// ErrProtocol: the server broke the protocol, or speaks a dialect that is not supported.
	ErrProtocol = errors.New("NBD protocol violation")
	// ErrLost: the connection broke. What was in flight may have been done or not.
	ErrLost = errors.New("NBD connection is lost")
	// ErrClosed: Close was called.
	ErrClosed = errors.New("NBD connection is closed")
)

// Numbers of errors as servers send them.
const (
	// EPERM: the export is read-only, or not for us.
	EPERM = wire.EPERM
	// EIO: reading or writing failed on the server's side.
	EIO = wire.EIO
	// EINVAL: the server did not take the request.
	EINVAL = wire.EINVAL
	// ENOSPC: no space left on the server's side.
	ENOSPC = wire.ENOSPC
	// EOVERFLOW: the answer would be too long for what was asked.
	EOVERFLOW = wire.EOVERFLOW
	// ENOTSUP: the export cannot do it.
	ENOTSUP = wire.ENOTSUP
	// ESHUTDOWN: the server is going away.
	ESHUTDOWN = wire.ESHUTDOWN
)

// Error is what a server answered to one request; the connection goes on.
type Error struct {
	// Errno is one of the numbers above, or another that the server chose.
	Errno uint32
	// Text is the server's own word, for people; mostly empty.
	Text string
}

func (e *Error) Error() string {
	name := map[uint32]string{
		EPERM: "not permitted", EIO: "input/output error", EINVAL: "invalid request", ENOSPC: "no space left",
		EOVERFLOW: "too long", ENOTSUP: "not supported", ESHUTDOWN: "server is shutting down",
	}[e.Errno]
	if name == "" {
		name = fmt.Sprintf("error %d", e.Errno)
	}
	if e.Text != "" {
		name += " (" + e.Text + ")"
	}
	return "NBD server answers: " + name
}

// Refused says that the server failed the request, as the guest of a disk would see it, and not that it goes away, after
// which its clients come again.
func (e *Error) Refused() bool { return e.Errno != ESHUTDOWN }

func protocol(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrProtocol}, args...)...)
}
