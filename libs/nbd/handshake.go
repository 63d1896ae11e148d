package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/libs/nbd/internal/wire"
)

// handshakeTimeout bounds a handshake whose context has no deadline.
const handshakeTimeout = 30 * time.Second

// parseURI returns where an export is: network and address to dial, and its name.
func parseURI(uri string) (network, address, export string, err error) {
	u, err := url.Parse(uri)
	if err != nil {
		return "", "", "", fmt.Errorf("%w: %w", ErrURI, err)
	}
	export = strings.TrimPrefix(u.Path, "/")
	if len(export) > wire.MaxName {
		return "", "", "", fmt.Errorf("%w: export name of %d bytes", ErrURI, len(export))
	}
	switch socket := u.Query().Get("socket"); {
	case u.Scheme == "nbd+unix" && u.Host == "" && socket != "":
		return "unix", socket, export, nil
	case u.Scheme == "nbd" && u.Hostname() != "" && u.Port() != "":
		return "tcp", u.Host, export, nil
	case u.Scheme == "nbd" && u.Hostname() != "":
		return "tcp", net.JoinHostPort(u.Hostname(), "10809"), export, nil
	}
	return "", "", "", fmt.Errorf("%w: %q", ErrURI, uri)
}

// Dial connects to nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH and agrees on every context named, or fails
// with ErrNoContext. The context bounds the handshake only.
func Dial(ctx context.Context, uri string, contexts ...string) (*Client, error) {
	network, address, export, err := parseURI(uri)
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, address)
	if err != nil {
		return nil, fmt.Errorf("connect to export %s: %w: %w", uri, ErrLost, err)
	}
	c, err := New(ctx, conn, export, contexts...)
	if err != nil {
		return nil, fmt.Errorf("open export %s: %w", uri, err)
	}
	return c, nil
}

// New does the handshake on a connection to a server and owns it from then on, also when it fails.
func New(ctx context.Context, conn net.Conn, export string, contexts ...string) (*Client, error) {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(handshakeTimeout)
	}
	_ = conn.SetDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	c := newClient(conn)
	err := c.handshake(export, contexts)
	// When the context ended just now, its function may still set the deadline: then the connection is not usable.
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		if ctx.Err() != nil || errors.Is(err, os.ErrDeadlineExceeded) {
			err = fmt.Errorf("%w: %w", expired(ctx, err), err)
		}
		return nil, errors.Join(err, ignoreClosed(conn.Close()))
	}
	_ = conn.SetDeadline(time.Time{})
	go c.run()
	return c, nil
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (c *Client) handshake(export string, contexts []string) error {
	var hello [18]byte
	if err := c.fill(hello[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint64(hello[:]) != wire.MagicServer || binary.BigEndian.Uint64(hello[8:]) != wire.MagicOption {
		return protocol("not a newstyle NBD server")
	}
	flags := binary.BigEndian.Uint16(hello[16:])
	if flags&wire.FlagFixedNewstyle == 0 {
		return protocol("the server does not speak fixed newstyle")
	}
	answer := binary.BigEndian.AppendUint32(nil, uint32(flags&(wire.FlagFixedNewstyle|wire.FlagNoZeroes)))
	if _, err := c.conn.Write(answer); err != nil {
		return fmt.Errorf("%w: %w", ErrLost, err)
	}
	refused, err := c.option(wire.OptStructuredReply, nil, nil)
	if err != nil {
		return err
	}
	c.structured = refused == nil
	if len(contexts) > 0 {
		if !c.structured {
			return fmt.Errorf("%w %q: the server has no structured replies", ErrNoContext, contexts[0])
		}
		if err := c.agree(export, contexts); err != nil {
			return err
		}
	}
	return c.choose(export)
}

// agree asks for contexts. A server acknowledges the option without them if it does not have them.
func (c *Client) agree(export string, contexts []string) error {
	msg := appendText(nil, export)
	msg = binary.BigEndian.AppendUint32(msg, uint32(len(contexts)))
	for _, name := range contexts {
		if len(name) > wire.MaxName {
			return fmt.Errorf("%w: a name of %d bytes", ErrNoContext, len(name))
		}
		msg = appendText(msg, name)
	}
	refused, err := c.option(wire.OptSetMeta, msg, func(kind uint32, body []byte) error {
		if kind != wire.RepMeta || len(body) < 4 {
			return protocol("reply %d of %d bytes to the wish for contexts", kind, len(body))
		}
		id, name := binary.BigEndian.Uint32(body), string(body[4:])
		if !slices.Contains(contexts, name) {
			return protocol("a context that nobody asked for: %.64q", name)
		}
		if _, twice := c.contexts[name]; twice {
			return protocol("context %.64q is given twice", name)
		}
		for other, used := range c.contexts {
			if used == id {
				return protocol("contexts %.64q and %.64q have one number", other, name)
			}
		}
		c.contexts[name] = id
		return nil
	})
	if err != nil {
		return err
	}
	if refused != nil && slices.Contains([]uint32{wire.RepErrUnknown, wire.RepErrPolicy, wire.RepErrTLS}, refused.code) {
		return fmt.Errorf("%w: %s", ErrNoExport, refused)
	}
	for _, name := range contexts {
		if _, ok := c.contexts[name]; ok {
			continue
		}
		if refused != nil {
			return fmt.Errorf("%w %q: %s", ErrNoContext, name, refused)
		}
		return fmt.Errorf("%w %q", ErrNoContext, name)
	}
	return nil
}

// choose ends the handshake with the export.
func (c *Client) choose(export string) error {
	msg := appendText(nil, export)
	msg = binary.BigEndian.AppendUint16(msg, 1)
	msg = binary.BigEndian.AppendUint16(msg, wire.InfoBlockSize)
	known := false
	c.info.Block = BlockSizes{Min: 1, Preferred: 4096, Max: MaxPayload}
	refused, err := c.option(wire.OptGo, msg, func(kind uint32, body []byte) error {
		if kind != wire.RepInfo || len(body) < 2 {
			return protocol("reply %d of %d bytes to the choice of the export", kind, len(body))
		}
		switch info := binary.BigEndian.Uint16(body); {
		case info == wire.InfoExport && len(body) == 12:
			size := binary.BigEndian.Uint64(body[2:])
			if size > maxSize {
				return protocol("an export of %d bytes", size)
			}
			c.info.Size, c.info.flags, known = int64(size), binary.BigEndian.Uint16(body[10:]), true
		case info == wire.InfoBlockSize && len(body) == 14:
			b := BlockSizes{
				Min: int64(binary.BigEndian.Uint32(body[2:])), Preferred: int64(binary.BigEndian.Uint32(body[6:])),
				Max: int64(binary.BigEndian.Uint32(body[10:])),
			}
			if bits.OnesCount64(uint64(b.Min)) != 1 || b.Min > 64<<10 || b.Preferred < b.Min || b.Max < b.Min {
				return protocol("block sizes %d, %d, %d", b.Min, b.Preferred, b.Max)
			}
			b.Max = min(b.Max, MaxPayload) / b.Min * b.Min
			c.info.Block = b
		case info == wire.InfoExport || info == wire.InfoBlockSize:
			return protocol("information %d of %d bytes", info, len(body))
		}
		return nil
	})
	switch {
	case err != nil:
		return err
	case refused != nil && refused.code == wire.RepErrUnsup:
		return protocol("the server does not know NBD_OPT_GO")
	case refused != nil:
		return fmt.Errorf("%w %q: %s", ErrNoExport, export, refused)
	case !known:
		return protocol("the server did not tell the export's size")
	}
	return nil
}

// refusal is an error reply to an option.
type refusal struct {
	code uint32
	text string
}

func (r *refusal) String() string {
	name := map[uint32]string{
		wire.RepErrUnsup: "not supported", wire.RepErrPolicy: "forbidden by the server", wire.RepErrTLS: "TLS is required",
		wire.RepErrUnknown: "unknown export",
	}[r.code]
	if name == "" {
		name = fmt.Sprintf("error %#x", r.code)
	}
	if r.text != "" {
		name += ": " + r.text
	}
	return name
}

// option sends one option and gives each reply before the last to take.
func (c *Client) option(opt uint32, data []byte, take func(kind uint32, body []byte) error) (*refusal, error) {
	msg := binary.BigEndian.AppendUint64(nil, wire.MagicOption)
	msg = binary.BigEndian.AppendUint32(msg, opt)
	msg = append(binary.BigEndian.AppendUint32(msg, uint32(len(data))), data...)
	if _, err := c.conn.Write(msg); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrLost, err)
	}
	for range maxOptionReplies {
		var head [20]byte
		if err := c.fill(head[:]); err != nil {
			return nil, err
		}
		kind, n := binary.BigEndian.Uint32(head[12:]), binary.BigEndian.Uint32(head[16:])
		if binary.BigEndian.Uint64(head[:]) != wire.MagicReply || binary.BigEndian.Uint32(head[8:]) != opt || n > maxOptionReply {
			return nil, protocol("malformed reply to option %d", opt)
		}
		body := make([]byte, n)
		if err := c.fill(body); err != nil {
			return nil, err
		}
		switch {
		case kind == wire.RepAck:
			return nil, nil
		case kind&wire.RepErr != 0:
			return &refusal{code: kind, text: strings.ToValidUTF8(string(body[:min(n, wire.MaxName)]), "?")}, nil
		case take == nil:
			return nil, protocol("reply %d to option %d", kind, opt)
		}
		if err := take(kind, body); err != nil {
			return nil, err
		}
	}
	return nil, protocol("more than %d replies to option %d", maxOptionReplies, opt)
}

// fill reads exactly len(p) bytes.
func (c *Client) fill(p []byte) error {
	if _, err := io.ReadFull(c.in, p); err != nil {
		return fmt.Errorf("%w: %w", ErrLost, err)
	}
	return nil
}

func appendText(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}
