package cli

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/rpc/pki"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func (a *app) certificatesCommand() *cobra.Command {
	var ca, service, host, user, role, out string
	var names []string
	issue := &cobra.Command{
		Use: "issue --ca DIR --out DIR (--service NAME [--host H] | --user NAME --role R)", Short: "Issue or renew a certificate for a program of the fleet, or for a person", Args: cobra.NoArgs,
		Example: "  landfall certificates issue --ca ./ca --service uploader --out ./certificates/uploader\n" +
			"  landfall certificates issue --ca ./ca --service change-tracker --host host-1 --out ./certificates/change-tracker\n" +
			"  landfall certificates issue --ca ./ca --user anna --role operator --out ./certificates/anna",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var id pki.Identity
			switch {
			case service != "" && user == "":
				id = pki.ServiceIdentity(service)
				if host != "" {
					id = id.On(host)
				}
			case user != "" && service == "":
				r, err := pki.ParseRole(role)
				if err != nil {
					return &usageError{err, cmd.UsageString()}
				}
				id = pki.UserIdentity(user, r)
			default:
				return &usageError{errors.New("give either --service or --user"), cmd.UsageString()}
			}
			authority, err := pki.Open(ca, time.Now)
			if err == nil {
				_, err = authority.Ensure(out, pki.Request{Identity: id, Names: names})
			}
			if err != nil {
				return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, err, "issue certificate")
			}
			if a.format != "table" {
				return a.printValue(map[string]string{"identity": id.String(), "folder": out})
			}
			fmt.Fprintf(a.out, "%s: %s\n", out, strings.TrimSpace(id.String()))
			return nil
		},
	}
	f := issue.Flags()
	f.StringVar(&ca, "ca", "", "folder of the certificate authority; made when it is not there")
	f.StringVar(&out, "out", "", "folder for cert.pem, key.pem and ca.pem")
	f.StringVar(&service, "service", "", "service that the certificate speaks for")
	f.StringVar(&host, "host", "", "host that the service is bound to: host-provider and change-tracker")
	f.StringVar(&user, "user", "", "person or automation account that the certificate speaks for")
	f.StringVar(&role, "role", "viewer", "role of the user: viewer, operator or admin")
	f.StringSliceVar(&names, "name", nil, "further DNS names or addresses, for an event server")
	_ = issue.MarkFlagRequired("ca")
	_ = issue.MarkFlagRequired("out")
	return group("certificates", "Certificates of an installation", issue)
}
