// Package nbdclient is a small NBD client for writers in demonstrations and
// tests: fixed newstyle handshake, simple replies, one request at a time.
package nbdclient

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"time"
)

// Numbers of the NBD protocol (doc/proto.md of the NBD project).
const (
	magicInit     = 0x4e42444d41474943
	magicOption   = 0x49484156454f5054
	magicReply    = 0x0003e889045565a9
	magicRequest  = 0x25609513
	magicSimple   = 0x67446698
	flagFixed     = 1
	flagNoZeroes  = 2
	optionGo      = 7
	replyAck      = 1
	replyInfo     = 3
	replyErrorBit = 1 << 31
	infoExport    = 0

	commandRead        = 0
	commandWrite       = 1
	commandDisconnect  = 2
	commandFlush       = 3
	commandTrim        = 4
	commandWriteZeroes = 6
	flagFUA            = 1
)

// requestTimeout bounds one request.
const requestTimeout = 30 * time.Second

// maxOptionReply bounds what a server may say during the handshake, in bytes.
const maxOptionReply = 64 << 10

// Client is one connection to one export. Not safe for concurrent use.
type Client struct {
	conn   net.Conn
	r      *bufio.Reader
	size   int64
	handle uint64
	broken error
}

// Dial connects to nbd://host:port/export or nbd+unix:///export?socket=path.
func Dial(ctx context.Context, uri string) (*Client, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return nil, fmt.Errorf("export %q: %w", uri, err)
	}
	network, address := "tcp", u.Host
	if u.Scheme == "nbd+unix" {
		network, address = "unix", u.Query().Get("socket")
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, address)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", uri, err)
	}
	c := &Client{conn: conn, r: bufio.NewReaderSize(conn, 64<<10)}
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(requestTimeout)
	}
	_ = conn.SetDeadline(deadline)
	if err := c.handshake(strings.TrimPrefix(u.Path, "/")); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("open export %s: %w", uri, err)
	}
	return c, nil
}

// Size is the export's size in bytes.
func (c *Client) Size() int64 { return c.size }

func (c *Client) handshake(export string) error {
	var hello [18]byte
	if _, err := io.ReadFull(c.r, hello[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint64(hello[:]) != magicInit || binary.BigEndian.Uint64(hello[8:]) != magicOption {
		return errors.New("not an NBD server of the newstyle")
	}
	flags := binary.BigEndian.Uint16(hello[16:])
	if flags&flagFixed == 0 {
		return errors.New("server does not speak fixed newstyle")
	}
	msg := binary.BigEndian.AppendUint32(nil, uint32(flags&(flagFixed|flagNoZeroes)))
	msg = binary.BigEndian.AppendUint64(msg, magicOption)
	msg = binary.BigEndian.AppendUint32(msg, optionGo)
	msg = binary.BigEndian.AppendUint32(msg, uint32(4+len(export)+2))
	msg = binary.BigEndian.AppendUint32(msg, uint32(len(export)))
	msg = append(msg, export...)
	msg = binary.BigEndian.AppendUint16(msg, 0)
	if _, err := c.conn.Write(msg); err != nil {
		return err
	}
	for {
		var head [20]byte
		if _, err := io.ReadFull(c.r, head[:]); err != nil {
			return err
		}
		kind, n := binary.BigEndian.Uint32(head[12:]), binary.BigEndian.Uint32(head[16:])
		if binary.BigEndian.Uint64(head[:]) != magicReply || n > maxOptionReply {
			return errors.New("malformed reply to an option")
		}
		body := make([]byte, n)
		if _, err := io.ReadFull(c.r, body); err != nil {
			return err
		}
		switch {
		case kind == replyAck:
			if c.size == 0 {
				return errors.New("server did not tell the export's size")
			}
			return nil
		case kind == replyInfo && len(body) >= 12 && binary.BigEndian.Uint16(body) == infoExport:
			c.size = int64(binary.BigEndian.Uint64(body[2:]))
		case kind&replyErrorBit != 0:
			return fmt.Errorf("server refused: %s (%#x)", body, kind)
		}
	}
}

// request sends one command and reads its reply; into receives a read's data.
func (c *Client) request(command, flags uint16, off int64, length int, data, into []byte) error {
	if c.broken != nil {
		return c.broken
	}
	err := c.exchange(command, flags, off, length, data, into)
	var refused *Error
	if err != nil && !errors.As(err, &refused) {
		c.broken = err
	}
	return err
}

func (c *Client) exchange(command, flags uint16, off int64, length int, data, into []byte) error {
	_ = c.conn.SetDeadline(time.Now().Add(requestTimeout))
	c.handle++
	msg := binary.BigEndian.AppendUint32(make([]byte, 0, 28), magicRequest)
	msg = binary.BigEndian.AppendUint16(msg, flags)
	msg = binary.BigEndian.AppendUint16(msg, command)
	msg = binary.BigEndian.AppendUint64(msg, c.handle)
	msg = binary.BigEndian.AppendUint64(msg, uint64(off))
	msg = binary.BigEndian.AppendUint32(msg, uint32(length))
	buffers := net.Buffers{msg, data}
	if _, err := buffers.WriteTo(c.conn); err != nil {
		return fmt.Errorf("send request: %w", err)
	}
	if command == commandDisconnect {
		return nil
	}
	var reply [16]byte
	if _, err := io.ReadFull(c.r, reply[:]); err != nil {
		return fmt.Errorf("read reply: %w", err)
	}
	if binary.BigEndian.Uint32(reply[:]) != magicSimple || binary.BigEndian.Uint64(reply[8:]) != c.handle {
		return errors.New("malformed reply")
	}
	if code := binary.BigEndian.Uint32(reply[4:]); code != 0 {
		return &Error{Code: code}
	}
	if _, err := io.ReadFull(c.r, into); err != nil {
		return fmt.Errorf("read data: %w", err)
	}
	return nil
}

// Error is what the server answered; the connection goes on.
type Error struct {
	// Code is an errno of the protocol, for example 5 (input/output error) or 28 (no space).
	Code uint32
}

func (e *Error) Error() string { return fmt.Sprintf("NBD error %d", e.Code) }

// codeShutdown is the errno of a server that is going away: its clients come again.
const codeShutdown = 108

// Refused says that the server failed the request, as the guest of a disk would see it.
func (e *Error) Refused() bool { return e.Code != codeShutdown }

// ReadAt fills p from off.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	return len(p), c.request(commandRead, 0, off, len(p), nil, p)
}

// WriteAt writes p at off and returns when the server has acknowledged it.
func (c *Client) WriteAt(p []byte, off int64) (int, error) {
	return len(p), c.request(commandWrite, 0, off, len(p), p, nil)
}

// WriteFUA writes p at off, durably.
func (c *Client) WriteFUA(p []byte, off int64) error {
	return c.request(commandWrite, flagFUA, off, len(p), p, nil)
}

// Flush makes every acknowledged write durable.
func (c *Client) Flush() error { return c.request(commandFlush, 0, 0, 0, nil, nil) }

// Trim tells that a range is not needed.
func (c *Client) Trim(off, length int64) error {
	return c.request(commandTrim, 0, off, int(length), nil, nil)
}

// WriteZeroes makes a range zero.
func (c *Client) WriteZeroes(off, length int64) error {
	return c.request(commandWriteZeroes, 0, off, int(length), nil, nil)
}

// Close says good-bye and closes the connection.
func (c *Client) Close() error {
	if c.broken == nil {
		_ = c.request(commandDisconnect, 0, 0, 0, nil, nil)
	}
	return c.conn.Close()
}
