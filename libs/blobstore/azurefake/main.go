package azurefake

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"time"
)

// controlPath is outside of every account: GET stats, POST reset, GET blob?container=C&name=N. It asks for no credentials and
// is counted nowhere.
const controlPath = "/-/azurefake/"

// Announcement is the line of JSON that [Main] prints when it listens.
type Announcement struct {
	URL, ConnectionString, CertificatePEM, Control string
}

// Main runs a server of its own process, such as the sink of a benchmark, until ctx ends. It prints one line of JSON, an
// [Announcement], to out when it listens. args are flags; an error of them is explained by the flag package. Below
// Announcement.Control are stats (GET, a [Stats]), reset (POST) and blob?container=C&name=N (GET, a [BlobState]).
func Main(ctx context.Context, args []string, out io.Writer) error {
	var o Options
	f := flag.NewFlagSet("azurefake", flag.ContinueOnError)
	addr := f.String("addr", "127.0.0.1:0", "address to listen on")
	f.StringVar(&o.Account, "account", "", "name of the account (made up)")
	f.StringVar(&o.Key, "key", "", "key of the account in base64 (made up)")
	f.BoolVar(&o.TLS, "tls", false, "serve https with a self-signed certificate")
	f.BoolVar(&o.Discard, "discard", false, "keep sizes and ranges and no bytes")
	f.BoolVar(&o.Digest, "digest", false, "keep a digest of what was written")
	f.DurationVar(&o.Latency, "latency", 0, "added to each request")
	f.Float64Var(&o.Bandwidth, "bandwidth", 0, "bytes/s of all bodies; 0 is unlimited")
	f.Float64Var(&o.BlobBandwidth, "blob-bandwidth", 0, "bytes/s of the bodies of one blob; 0 is unlimited")
	f.Float64Var(&o.PageBlobRequests, "page-requests", 0, "requests/s of one page blob before 503; 0 is 500, -1 no limit")
	f.Float64Var(&o.PageBlobBytes, "page-bytes", 0, "bytes/s of one page blob before 503; 0 is 60 MiB, -1 no limit")
	f.Float64Var(&o.AccountRequests, "requests", 0, "requests/s of the account before 503; 0 is no limit")
	f.Int64Var(&o.Capacity, "capacity", 0, "bytes of the account; 0 is 8 GiB, unlimited with -discard")
	if err := f.Parse(args); err != nil {
		return err
	}
	s := New(o)
	if err := s.Listen(*addr); err != nil {
		return err
	}
	a := Announcement{URL: s.URL(), ConnectionString: s.ConnectionString(), CertificatePEM: string(s.certPEM), Control: s.scheme() + "://" + s.Addr() + controlPath}
	if err := json.NewEncoder(out).Encode(a); err != nil {
		return errors.Join(fmt.Errorf("announce azurefake: %w", err), s.Close())
	}
	<-ctx.Done()
	return s.Close()
}

func (s *Server) control(w http.ResponseWriter, r *http.Request, what string) {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(time.Minute))
	var v any
	switch r.Method + " " + what {
	case "GET stats":
		v = s.Stats()
	case "POST reset":
		s.ResetStats()
		v = struct{}{}
	case "GET blob":
		st, ok := s.Blob(r.URL.Query().Get("container"), r.URL.Query().Get("name"))
		if !ok {
			http.NotFound(w, r)
			return
		}
		v = st
	default:
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // a client that is gone has nobody to tell
}
