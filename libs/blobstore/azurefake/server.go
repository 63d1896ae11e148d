package azurefake

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TenantID is the tenant that the server says to belong to.
const TenantID = "00000000-0000-4000-8000-000000000001"

// Server is the fake. It is an [http.Handler]; Start or Listen give it an address. All methods may be called concurrently.
type Server struct {
	// Account and Key (base64) of the storage account.
	Account, Key string

	opts     Options
	key      []byte
	udKey    []byte // signs user delegation keys
	certPEM  []byte
	tlsCert  tls.Certificate
	shape    *pace
	limit    *limits
	requests atomic.Uint64
	stats    stats

	mu         sync.Mutex
	containers map[string]*container
	used       int64
	full       bool
	etags      uint64
	born       uint64 // incarnations
	grants     map[string]Grants
	intercept  func(*http.Request) Fault

	listener net.Listener
	http     *http.Server
	served   chan struct{}
	closing  sync.Once
}

// New returns a server that does not listen yet. It panics on a key that is not base64: that is an error of the test.
func New(o Options) *Server {
	if o.Account == "" {
		o.Account = "lf" + hex.EncodeToString(random(6))
	}
	if o.Key == "" {
		o.Key = base64.StdEncoding.EncodeToString(random(64))
	}
	key, err := base64.StdEncoding.DecodeString(o.Key)
	if err != nil {
		panic(fmt.Sprintf("azurefake: the account's key: %v", err))
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.MaxSkew == 0 {
		o.MaxSkew = standardSkew
	}
	if o.LimitBurst == 0 {
		o.LimitBurst = 250 * time.Millisecond
	}
	if o.Capacity == 0 && !o.Discard {
		o.Capacity = 8 << 30
	}
	if o.FullStatus == 0 {
		o.FullStatus = http.StatusConflict
	}
	if o.FullCode == "" {
		o.FullCode = "AccountCapacityExceeded"
	}
	o.PageBlobRequests = target(o.PageBlobRequests, 500)
	o.PageBlobBytes = target(o.PageBlobBytes, 60<<20)
	s := &Server{
		Account: o.Account, Key: o.Key, opts: o, key: key, udKey: random(32), containers: map[string]*container{},
		grants: map[string]Grants{}, intercept: o.Intercept, served: make(chan struct{}),
		shape: newPace(o.Bandwidth), limit: newLimits(max(o.AccountRequests, 0), 0, o.LimitBurst),
	}
	for token, g := range o.Principals {
		s.grants[token] = g
	}
	s.stats.reset()
	if o.TLS {
		s.certificate()
	}
	return s
}

func target(set, standard float64) float64 {
	if set == 0 {
		return standard
	}
	return max(set, 0)
}

func random(n int) []byte {
	p := make([]byte, n)
	rand.Read(p)
	return p
}

func (s *Server) now() time.Time { return s.opts.Now().UTC() }

// Start listens on a free loopback port until the end of the test, and returns the server.
func (s *Server) Start(t testing.TB) *Server {
	t.Helper()
	if err := s.Listen("127.0.0.1:0"); err != nil {
		t.Fatalf("start azurefake: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close azurefake: %v", err)
		}
	})
	return s
}

// Listen serves at the address, host:port, until Close.
func (s *Server) Listen(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("azurefake listens: %w", err)
	}
	s.listener = l
	s.http = &http.Server{Handler: s, ReadHeaderTimeout: time.Minute, MaxHeaderBytes: 64 << 10}
	if s.opts.TLS {
		// HTTP/1.1 only, as blob endpoints are: a reset ends one request.
		l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{s.tlsCert}, MinVersion: tls.VersionTLS12})
	}
	go func() {
		defer close(s.served)
		_ = s.http.Serve(l) // ends by Close
	}()
	return nil
}

// Close ends the server and every connection. Later calls do nothing.
func (s *Server) Close() error {
	var err error
	s.closing.Do(func() {
		if s.http != nil {
			err = s.http.Close()
			<-s.served
		}
	})
	return err
}

// Addr is the address that it listens on, host:port.
func (s *Server) Addr() string { return s.listener.Addr().String() }

func (s *Server) scheme() string {
	if s.opts.TLS {
		return "https"
	}
	return "http"
}

// URL is the blob endpoint, http://127.0.0.1:PORT/ACCOUNT. The server also answers to a Host of ACCOUNT.anything without the
// account in the path, for clients whose transport dials here.
func (s *Server) URL() string { return s.scheme() + "://" + s.Addr() + "/" + s.Account }

// ConnectionString has the account's key and the endpoint.
func (s *Server) ConnectionString() string {
	return fmt.Sprintf("DefaultEndpointsProtocol=%s;AccountName=%s;AccountKey=%s;BlobEndpoint=%s;", s.scheme(), s.Account, s.Key, s.URL())
}

// CertificatePEM is what a client has to trust with TLS: a self-signed certificate for 127.0.0.1, localhost and
// ACCOUNT.blob.core.windows.net.
func (s *Server) CertificatePEM() []byte { return s.certPEM }

// Client is an HTTP client that trusts the server. The caller closes its idle connections.
func (s *Server) Client() *http.Client {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(s.certPEM)
	return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, MaxIdleConnsPerHost: 64}}
}

func (s *Server) certificate() {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "azurefake"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(30 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true, IsCA: true,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		DNSNames:    []string{"localhost", s.Account + ".blob.core.windows.net"},
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	s.tlsCert = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	s.certPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// SetGrants gives a bearer token these rights; nil takes the token back.
func (s *Server) SetGrants(token string, g Grants) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if g == nil {
		delete(s.grants, token)
		return
	}
	s.grants[token] = g
}

// SetIntercept replaces Options.Intercept for requests that begin from now on.
func (s *Server) SetIntercept(f func(*http.Request) Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.intercept = f
}

// SetFull makes the account answer as a full one, or not, whatever Options.Capacity says.
func (s *Server) SetFull(full bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.full = full
}

// SetWriteOnce gives an existing container a policy; the zero value takes it away. It reports whether there is such a container.
func (s *Server) SetWriteOnce(name string, w WriteOnce) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, e := s.find(name)
	if e != nil {
		return false
	}
	c.once = w
	return true
}

// BlobState is what the server keeps of a blob.
type BlobState struct {
	Size      int64
	Valid     int64 // bytes of valid pages; of a block blob its size
	Digest    uint64
	Snapshots int
	Sequence  int64
}

// Blob looks at a blob without a request. Digest is with Options.Digest the sum of [PageDigest] over all that was written to
// it by Put Page (for a page blob written once: that of its content), or the CRC64 of a block blob of one block.
func (s *Server) Blob(containerName, name string) (BlobState, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, e := s.find(containerName)
	if e != nil {
		return BlobState{}, false
	}
	f, ok := c.blobs.Get(name)
	if !ok || f.base == nil {
		return BlobState{}, false
	}
	st := BlobState{Size: f.base.size, Valid: f.base.size, Digest: f.base.digest, Snapshots: len(f.snaps), Sequence: f.base.seq}
	if f.base.isPages {
		st.Valid = f.base.pages.valid * pageSize
	} else if len(f.base.blocks) == 1 {
		st.Digest = f.base.blocks[0].crc
	}
	return st, true
}

// Tamper changes the byte at an offset of a blob behind the back of every rule, as rot does. It reports whether the blob has
// that byte.
func (s *Server) Tamper(containerName, name string, off int64, change func(byte) byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, e := s.find(containerName)
	if e != nil {
		return false
	}
	f, ok := c.blobs.Get(name)
	if !ok || f.base == nil || off < 0 || off >= f.base.size {
		return false
	}
	if f.base.isPages {
		c, _ := f.base.pages.own(off/chunkSize, true)
		if c.data == nil {
			return false
		}
		c.data[off%chunkSize] = change(c.data[off%chunkSize])
		return true
	}
	for i, b := range f.base.blocks {
		if off < b.size {
			if b.data == nil {
				return false
			}
			data := append([]byte(nil), b.data...)
			data[off] = change(data[off])
			f.base.blocks[i].data = data
			return true
		}
		off -= b.size
	}
	return false
}

// Used is the memory that the account's data takes, in bytes.
func (s *Server) Used() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.used
}

// wait sleeps until d has passed or the context ends.
func wait(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}
