package qmp

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/landfall-dr/landfall/libs/errcat"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

const (
	// maxLine bounds one message: the schema and the list of block nodes have some hundred KiB.
	maxLine = 64 << 20
	// dialTimeout bounds connect.
	dialTimeout = 2 * time.Second
	// greetingTimeout is how long a monitor may take to greet. A monitor that has a client already stays silent.
	greetingTimeout = 2 * time.Second
	// defaultTimeout ends a command whose context has no deadline.
	defaultTimeout = 30 * time.Second
)

var (
	// ErrInUse: the socket accepts and says nothing, because it serves somebody else.
	ErrInUse = errors.New("the socket is in use by another program, or its process hangs")
	// ErrClosed: the connection was closed or broke.
	ErrClosed = errors.New("connection closed")
	// errLine: a message is longer than maxLine.
	errLine = errors.New("message too long")
)

// CommandError is a refusal by QEMU or by the guest agent.
type CommandError struct {
	// Command that was refused.
	Command string `json:"-"`
	// Class, for example GenericError, CommandNotFound or DeviceNotActive.
	Class string `json:"class"`
	// Desc is a sentence for people. It must not be matched on.
	Desc string `json:"desc"`
}

// Error returns the command and the sentence.
func (e *CommandError) Error() string { return e.Command + ": " + e.Desc }

// Refused reports whether err is an answer of the other side: the command did not happen.
func Refused(err error) bool {
	var c *CommandError
	return errors.As(err, &c)
}

func unreachable(err error, format string, args ...any) error {
	return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE, err, format, args...)
}

func dial(ctx context.Context, socket string) (net.Conn, error) {
	d := net.Dialer{Timeout: dialTimeout}
	conn, err := d.DialContext(ctx, "unix", socket)
	switch {
	case err == nil:
		return conn, nil
	case errors.Is(err, syscall.EAGAIN): // a full backlog: others wait in silence already
		return nil, ErrInUse
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("nothing listens: %w", err)
	}
	return nil, err
}

// readLine returns the next line without its end. The slice is valid until the next call only if it fits the buffer;
// callers use it at once.
func readLine(r *bufio.Reader) ([]byte, error) {
	line, err := r.ReadSlice('\n')
	if err == nil {
		return line, nil
	}
	if !errors.Is(err, bufio.ErrBufferFull) {
		if errors.Is(err, io.EOF) {
			err = ErrClosed
		}
		return nil, err
	}
	long := append([]byte(nil), line...)
	for {
		line, err = r.ReadSlice('\n')
		if len(long)+len(line) > maxLine {
			return nil, errLine
		}
		long = append(long, line...)
		if err == nil {
			return long, nil
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return nil, err
		}
	}
}

func withDefault(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, defaultTimeout)
}
